"""What computes: backbone, recurrence, head."""
