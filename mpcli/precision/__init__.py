"""Number formats, the loss scale, and the tensors that carry it."""
