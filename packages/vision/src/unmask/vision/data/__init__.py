"""Images: where they are, decoding, augmentation and batches."""
