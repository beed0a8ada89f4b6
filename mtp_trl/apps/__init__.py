"""What shows an adapted model to people: in a terminal, in a browser, and the whole way in minutes."""
