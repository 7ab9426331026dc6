#pragma once
#include <functional>

namespace fc {

using Interrupt = std::function<void()>;  // called between blocks of work; throws to stop

}  // namespace fc
