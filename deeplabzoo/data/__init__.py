"""Pictures and masks: reading, class lists, palettes, data sets."""
