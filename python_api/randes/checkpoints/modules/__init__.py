"""What a module's own code does with its parameters, and how some of them move aside."""
