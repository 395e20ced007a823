"""What the paper compares the method with."""
