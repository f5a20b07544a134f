"""How the work of an update is spread over processes; models know nothing of it."""
