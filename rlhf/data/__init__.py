"""Records, TL;DR processing, embedded data, and one LightningDataModule per stage."""
