"""What a host is made of, asked of its own tools: pure parsers, and the calls that feed them."""
