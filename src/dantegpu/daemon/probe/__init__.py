"""What this machine has to offer, and how busy it is."""
