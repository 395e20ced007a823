#include "scratch.h"

#include <new>

namespace vlmteacher {

void* allocate(int64_t bytes) {
  void* found = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!found && bytes) throw std::bad_alloc();
  return found;
}

}  // namespace vlmteacher
