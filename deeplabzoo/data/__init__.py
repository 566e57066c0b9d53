"""Data: reading images and masks, class lists, datasets, augmentation, downloads."""
