"""The decoder, as a folder that is uploaded with every model."""
