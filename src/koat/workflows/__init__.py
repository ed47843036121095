"""What a user asks for; the only place where rooms meet."""
