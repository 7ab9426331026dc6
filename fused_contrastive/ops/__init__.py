"""The primitive: its schema, the choice of backend, its one autograd formula, and the public function."""
