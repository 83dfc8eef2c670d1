"""Other libraries to compare with. What is not installed is left out, and the run says so."""
