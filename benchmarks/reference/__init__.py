"""What others do, written here plainly from its description: checked for equal output first, then timed."""
