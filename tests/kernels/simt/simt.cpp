// The machine behind simt.h: fibers, their scheduler, and memory with fences.
#include "simt.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr unsigned char Poison = 0xff;  // NaN in every floating-point type
constexpr size_t StackBytes = 64 << 10, MostShared = 227 << 10, MostThreads = 1024;

enum class State { Runs, AtBarrier, Meets, Exited };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  dim3 index;
  jmp_buf context;
  bool started = false;
  State state = State::Exited;
  Where where;
  const char* meeting = nullptr;
  uint32_t mask = 0;
  void* argument = nullptr;
  std::vector<Copy> copies;
  int group = 0;  // of copies that are not yet committed
};

struct Fence {  // [begin, end) lies between two inaccessible pages
  unsigned char *pages, *begin, *end;
  size_t length;
};

std::vector<Fiber> fibers(MostThreads);
unsigned char* stacks;
Fiber* current;
unsigned threads;
jmp_buf scheduler;
const std::function<void()>* running;
std::string failure;
std::mt19937_64 order;
std::map<const void*, Fence> fences;
unsigned char* shared;
size_t shared_size;
std::span<unsigned char> static_shared;

std::string format(const char* text, va_list arguments) {
  char buffer[1024];
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  return buffer;
}

std::string name(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string describe(const Fiber& fiber) {
  const auto id = static_cast<unsigned>(&fiber - fibers.data());
  const std::string who = "thread " + std::to_string(id);
  switch (fiber.state) {
    case State::Exited:
      return who + (id < threads ? " has exited" : " does not exist");
    case State::AtBarrier:
      return who + " waits at the barrier of " + name(fiber.where);
    case State::Meets: {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", fiber.mask);
      return who + " waits in " + fiber.meeting + " of " + name(fiber.where) + " with mask " + mask;
    }
    default:
      return who + " runs";
  }
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

Fence fenced(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page + page;
  auto* pages = static_cast<unsigned char*>(
      mmap(nullptr, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, page, PROT_NONE);
  mprotect(pages + page + room, page, PROT_NONE);
  unsigned char* end = pages + page + room;
  unsigned char* begin = end - (bytes + 15) / 16 * 16;
  std::memset(pages + page, Poison, room);
  return {pages, begin, begin + bytes, room + 2 * page};
}

// The bytes around the memory, up to the forbidden pages, are still as they were?
bool untouched(const Fence& fence) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const auto clean = [](const unsigned char* from, const unsigned char* to) {
    return std::all_of(from, to, [](unsigned char byte) { return byte == Poison; });
  };
  return clean(fence.pages + page, fence.begin) && clean(fence.end, fence.pages + fence.length - page);
}

// Every `__shared__` variable of this library: nothing else in it is thread_local, but for the one that brings the
// block into being.
std::span<unsigned char> find_static_shared() {
  static thread_local volatile char present;
  present = 1;
  std::span<unsigned char> found;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* to) {
        Dl_info own;
        if (!dladdr(reinterpret_cast<void*>(&find_static_shared), &own)) return 1;
        if (reinterpret_cast<void*>(library->dlpi_addr) != own.dli_fbase) return 0;
        for (int i = 0; i < library->dlpi_phnum; ++i)
          if (library->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<std::span<unsigned char>*>(to) = {static_cast<unsigned char*>(library->dlpi_tls_data),
                                                           library->dlpi_phdr[i].p_memsz};
        return 1;
      },
      &found);
  if (!found.data()) throw Fault("the static shared memory was not found");
  return found;
}

void suspend() {
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*running)();
    current->state = State::Exited;
    suspend();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + StackBytes * (&fiber - fibers.data());
  context.uc_stack.ss_size = StackBytes;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL) fault("an index outside of an array or an address that is not aligned");  // -fsanitize's
  const auto* address = static_cast<unsigned char*>(info->si_addr);
  for (const auto& [begin, fence] : fences)
    if (fence.pages <= address && address < fence.pages + fence.length)
      fault("an access %td bytes from the start of %s of %td bytes", address - fence.begin,
            begin == shared ? "shared memory" : "a buffer", fence.end - fence.begin);
  fault("an access to %p, which is no memory of this program", info->si_addr);
}

class Signals {  // a Fault instead of the end of the process, while a kernel runs
 public:
  Signals() {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (size_t i = 0; i < 3; ++i) sigaction(numbers_[i], &action, &before_[i]);
  }
  ~Signals() {
    for (size_t i = 0; i < 3; ++i) sigaction(numbers_[i], &before_[i], nullptr);
  }

 private:
  const int numbers_[3] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction before_[3];
};

std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> found(count);
  std::iota(found.begin(), found.end(), 0);
  std::shuffle(found.begin(), found.end(), order);
  return found;
}

// Nobody can go on: a barrier that all have reached opens, anything else is a mistake of the kernel.
void open_barrier() {
  const auto begin = fibers.begin(), end = fibers.begin() + threads;
  for (auto fiber = begin; fiber != end; ++fiber)
    if (fiber->state == State::Meets)
      for (unsigned i = 0; i < warpSize; ++i) {
        const Fiber& other = fibers[(fiber - begin) / warpSize * warpSize + i];
        const bool with = other.state == State::Meets && other.mask == fiber->mask && same(other.where, fiber->where);
        if (fiber->mask >> i & 1 && !with) throw Fault("collective: " + describe(*fiber) + ", " + describe(other));
      }
  for (auto fiber = begin; fiber != end; ++fiber)
    if (fiber->state != State::AtBarrier || !same(fiber->where, begin->where))
      throw Fault("barrier divergence: " + describe(*begin) + ", " + describe(*fiber));
  for (auto fiber = begin; fiber != end; ++fiber) fiber->state = State::Runs;
}

void run_block() {
  std::memset(shared, Poison, shared_size);
  std::ranges::fill(static_shared, Poison);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.state = State::Runs;
    fiber.copies.clear();
    fiber.group = 0;
  }
  const auto lives = [](const Fiber& fiber) { return fiber.state != State::Exited; };
  const auto exists = [] { return fibers.begin() + threads; };
  while (std::any_of(fibers.begin(), exists(), lives)) {
    for (const unsigned warp : shuffled((threads + warpSize - 1) / warpSize)) {
      const unsigned turn = order() % warpSize;
      bool went_on = true;
      while (std::exchange(went_on, false))
        for (unsigned i = 0; i < warpSize; ++i) {
          const unsigned id = warp * warpSize + (i + turn) % warpSize;
          if (id >= threads || fibers[id].state != State::Runs) continue;
          went_on = true;
          resume(fibers[id]);
          if (!failure.empty()) throw Fault(std::exchange(failure, {}));
        }
    }
    if (std::any_of(fibers.begin(), exists(), lives)) open_barrier();
  }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  threads = block.x * block.y * block.z;
  if (!threads || threads > MostThreads) throw Fault("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > MostShared) throw Fault(std::to_string(shared_bytes) + " bytes of shared memory");
  if (!stacks)
    stacks = static_cast<unsigned char*>(mmap(nullptr, StackBytes * MostThreads, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static_shared = find_static_shared();
  gridDim = grid, blockDim = block, running = &kernel;
  shared = static_cast<unsigned char*>(allocate(shared_bytes));
  shared_size = shared_bytes;
  const std::shared_ptr<void> fence(nullptr, [](void*) { release(shared), shared = nullptr; });
  const Signals signals;
  try {
    for (const unsigned id : shuffled(grid.x * grid.y * grid.z)) {
      blockIdx = dim3(id % grid.x, id / grid.x % grid.y, id / grid.x / grid.y);
      run_block();
    }
  } catch (const Fault& error) {
    for (Fiber& fiber : fibers) fiber.started = false, fiber.state = State::Exited;  // they stand amid a kernel
    char place[64];
    std::snprintf(place, sizeof place, " (block %u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
    throw Fault(error.what() + std::string(place));
  }
  for (const auto& [begin, around] : fences)
    if (!untouched(around))
      throw Fault(std::string("written just outside of ") + (begin == shared ? "shared memory" : "a buffer"));
}

void* allocate(size_t bytes) {
  const Fence fence = fenced(bytes);
  return fences[fence.begin] = fence, fence.begin;
}

void release(void* memory) {
  const auto found = fences.extract(memory);
  munmap(found.mapped().pages, found.mapped().length);
}

const char* attempt(const std::function<void()>& work) {
  static std::string message;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void fault(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  failure = format(text, arguments) + ", by thread " + std::to_string(current - fibers.data());
  va_end(arguments);
  _longjmp(scheduler, 1);
}

unsigned char* dynamic_shared() { return shared; }

void check_shared(const void* address, int bytes, const char* what, const Where& where) {
  const auto* at = static_cast<const unsigned char*>(address);
  const bool dynamic = shared <= at && at + bytes <= shared + shared_size;
  const bool fixed = static_shared.data() <= at && at + bytes <= static_shared.data() + static_shared.size();
  if (!dynamic && !fixed)
    fault("%s at %s: %d bytes at %td are outside of shared memory (%zu bytes)", what, name(where).c_str(), bytes,
          at - shared, shared_size);
  if (reinterpret_cast<uintptr_t>(at) % bytes)
    fault("%s at %s: an address that is not aligned to %d bytes", what, name(where).c_str(), bytes);
}

void barrier(const Where& where) {
  current->state = State::AtBarrier;
  current->where = where;
  suspend();
}

unsigned lane() { return static_cast<unsigned>(current - fibers.data()) % warpSize; }

void meet(const char* meeting, uint32_t mask, void* argument, const std::function<void(void**)>& together,
          const Where& where) {
  if (!(mask >> lane() & 1))
    fault("collective: %s at %s by lane %u, which is not in mask %08x", meeting, name(where).c_str(), lane(), mask);
  current->state = State::Meets;
  current->where = where;
  current->meeting = meeting;
  current->mask = mask;
  current->argument = argument;
  Fiber* const warp = current - lane();
  void* arguments[warpSize] = {};
  for (int i = 0; i < warpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = warp[i];
    if (other.state != State::Meets || other.mask != mask || !same(other.where, where)) return suspend();
    arguments[i] = other.argument;
  }
  together(arguments);
  for (int i = 0; i < warpSize; ++i)
    if (mask >> i & 1) warp[i].state = State::Runs;
}

void copy_async(void* to, const void* from, int bytes) {
  std::memset(to, Poison, 16);  // whoever reads it before it is waited for
  current->copies.push_back({to, from, bytes, current->group});
}

void copy_async_commit() { ++current->group; }

void copy_async_wait(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->group - pending) return false;
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

}  // namespace simt

extern "C" void simt_seed(uint64_t seed) { simt::order.seed(seed); }
extern "C" void* simt_allocate(size_t bytes) { return simt::allocate(bytes); }
extern "C" void simt_release(void* memory) { simt::release(memory); }
