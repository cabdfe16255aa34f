"""What turns records into quantities: hourly sums, and meters defined by the operator. Pure thinking."""
