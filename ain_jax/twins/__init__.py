"""What the twins of experiments begin with: the published models in small, at random, and the sample as files."""
