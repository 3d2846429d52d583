"""One file a route. Each has a `router` and takes the backend from the application's state."""
