"""A static page in an export's directory that writes with the exported model in a browser, and a server for it."""
