// Which of the processor's instruction sets the operators use: the widest that it and this build have, or fewer, so
// that one machine can compute as an older one. A class has all that the classes before it have.
#pragma once

// Functions of files that are compiled with wider vectors; absent where the compiler has no flags for them.
#define FOR_SOME_PROCESSORS __attribute__((weak))

namespace vlmteacher {

enum class Processor : int {
  kBaseline,    // what every processor of this architecture has
  kAvx2,        // and FMA
  kAvx512,      // F, BW, VL
  kAvx512Bf16,  // products of bfloat16
  kAmx,         // the vendor's libraries run on the matrix unit; our kernels are those of the class before
  kAmxTiles,    // ours do too
};

Processor widest();     // of this processor and this build; kAmxTiles is among them where the kernel grants the tiles
Processor processor();  // the one in use
void limit(Processor most);

inline bool uses(Processor least) { return processor() >= least; }

constexpr const char* kProcessors[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_tiles"};

}  // namespace vlmteacher
