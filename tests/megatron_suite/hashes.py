"""Short hashes of all bits of tensors."""

import hashlib

import torch


def value_hash(value) -> str:
    """Of the tensors in tuples, lists and dicts, with their types and shapes, and of strings."""
    digest = hashlib.sha1()
    _add(digest, value)
    return digest.hexdigest()[:16]


def gradient_hash(gradients) -> str:
    """Of tensors or None. A zero has no sign: adding the losses' gradients, which are 0, takes it away."""
    return value_hash([None if g is None else g + 0 for g in gradients])


def _add(digest, value) -> None:
    if torch.is_tensor(value):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + bits.numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(repr(key).encode())
            _add(digest, part)
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}".encode())
        for part in value:
            _add(digest, part)
    else:
        digest.update((value if isinstance(value, str) else type(value).__name__).encode())
