"""What goes over the wire, by resource: bodies as they come in, answers as they go out."""
