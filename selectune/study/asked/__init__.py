"""What a grid's file asks for.

shape    the type of each of its values, checked at one place before any is used
"""
