"""The contract room: label spaces, manifests, label stores, statistics and scores. Imports no other room."""
