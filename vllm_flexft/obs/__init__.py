"""What a run tells about itself. A leaf: it imports nothing else of this package."""
