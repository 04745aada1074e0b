"""What a step does, what it measures, and who decides."""
