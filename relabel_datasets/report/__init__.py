"""To look at: label maps drawn over their images."""
