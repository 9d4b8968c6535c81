"""The conditional Wasserstein GAN: networks, objectives, augmentation, and how good its images are."""
