"""What is learned: networks, from tensors to tensors."""
