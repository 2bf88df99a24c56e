"""Where the checkout is."""
