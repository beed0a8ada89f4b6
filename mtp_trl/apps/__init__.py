"""Programs that show how an adapted model decodes: in the terminal, in a browser, and a demo that takes minutes."""
