"""What is injected into a running system, below a format: errors, a full disk, a storage server that goes away."""
