"""FFN: the Feature Fusion Network for skeleton-based action recognition, and what it takes to train it."""

__version__ = "0.1.0"
