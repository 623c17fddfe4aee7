"""Filter nodes: nodes with one child, whose data is the child's."""
