"""Training students: `train`, its recipes, and timm's transforms with label maps."""
