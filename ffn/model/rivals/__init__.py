"""The rivals of Table 8, each in a file of its own: clips (N, M, T, V, C) float to class logits (N, K), as FFN's network."""
