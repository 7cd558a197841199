"""Adapts a pretrained GAN to few images: networks, transfer methods, data, metrics and the `adafm` command."""
