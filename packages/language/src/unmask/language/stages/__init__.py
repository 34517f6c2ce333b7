"""What is trained before a method, in stages of its run."""
