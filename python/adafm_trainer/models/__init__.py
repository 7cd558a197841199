"""Networks: the GP-GAN families, the AdaFM target generator, and what is copied, frozen and written of them."""
