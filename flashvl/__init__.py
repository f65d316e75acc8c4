"""flashvl: train and serve Flash-VL 2B vision-language models on Ray."""

__version__ = "0.1.0"
