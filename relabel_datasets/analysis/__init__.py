"""What can be counted: crops and objects, label maps, students."""
