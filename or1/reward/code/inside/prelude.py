"""The names that LeetCode offers programs: imports, ListNode, TreeNode, and functions that build and compare them."""

# ruff: noqa: F401, F403

import builtins
import collections
import datetime
import functools
import heapq
import itertools
import math
import random
import re
import string
import sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from string import *
from typing import *

inf = float("inf")
# The functions of math and operator accept no modulus and no complex numbers.
pow = builtins.pow
abs = builtins.abs


class ListNode:
    """A node of a singly linked list."""

    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    """A node of a binary tree."""

    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def list_node(values):
    """Return a linked list of `values`."""
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head


def tree_node(values):
    """Return a binary tree of `values` in level order, where None is a missing child."""
    if not values or values[0] is None:
        return None
    items = iter(values)
    root = TreeNode(next(items))
    waiting = collections.deque([root])
    while waiting:
        node = waiting.popleft()
        for side in ("left", "right"):
            value = next(items, None)
            if value is not None:
                setattr(node, side, TreeNode(value))
                waiting.append(getattr(node, side))
    return root


def is_same_list(first, second):
    """Return whether two linked lists hold the same values."""
    while first is not None and second is not None and first.val == second.val:
        first, second = first.next, second.next
    return first is None and second is None


def is_same_tree(first, second):
    """Return whether two binary trees hold the same values in the same places."""
    pairs = [(first, second)]
    while pairs:
        one, other = pairs.pop()
        if (one is None) != (other is None) or (one is not None and one.val != other.val):
            return False
        if one is not None:
            pairs += [(one.left, other.left), (one.right, other.right)]
    return True
