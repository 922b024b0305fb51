"""What can be said of a store, and of one that is to be made."""
