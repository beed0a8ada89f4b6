"""The decoder, a folder that is uploaded with every model."""
