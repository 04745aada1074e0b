"""What a run says of itself: log lines, a figure, a section of the model card."""
