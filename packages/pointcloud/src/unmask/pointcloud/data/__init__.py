"""Point clouds: where they are, reading, augmentation and batches."""
