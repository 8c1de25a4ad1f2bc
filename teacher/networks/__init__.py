"""The networks: trunks, decoders, scales, and how they are put together."""
