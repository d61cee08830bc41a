"""The recipe of ``zoo:tiny-diffusion``, a text-to-image diffusion model of articulated creatures."""
