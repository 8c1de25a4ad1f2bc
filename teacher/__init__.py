"""The network that labels: HRNet + OCR + hierarchical multi-scale attention."""
