"""Weights of transformers, torchaudio and fairseq, read and written; HEAR and s3prl."""
