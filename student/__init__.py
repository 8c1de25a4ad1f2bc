"""The network that learns: data, training, scoring and the comparison of arms."""
